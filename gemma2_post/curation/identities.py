"""Names of assistants and makers, and how assistants say who they are, in twelve languages.

Read by `self_identification`, which replaces names, nouns, and verbs in a sentence by one symbol each before it looks
for these forms.
"""
# ruff: noqa: RUF001 (letters of other scripts are what this module is about)

ASSISTANTS = [
    "ChatGPT|Chat GPT|InstructGPT|GPT|चैटजीपीटी|चैट जीपीटी|チャットGPT|챗GPT|챗지피티",
    "Gemma|जेम्मा|ジェマ|젬마",
    "Qwen|Tongyi Qianwen|通义千问|千问",
    "ERNIE|ERNIE Bot|文心一言",
    "DeepSeek|深度求索",
    "Kimi",
    "ChatGLM|智谱清言",
    "Doubao|豆包",
    "Hunyuan|混元",
    "InternLM|书生",
    "Baichuan|百川",
    "HyperCLOVA X|HyperCLOVA|하이퍼클로바X",
    *"PaLM, LaMDA, Mixtral, Le Chat, StableLM, Tülu, OLMo, HuggingChat, StarChat, Jamba, Replika, YouChat".split(", "),
    *"OpenAssistant|Open Assistant, Cortana, YandexGPT, GigaChat, WizardLM, Guanaco, OpenChat, Bing Chat".split(", "),
    *"Command R, Microsoft Copilot, 小度, 讯飞星火, 小爱同学, 小冰".split(", "),
]
"""Names that hardly anybody else has. The names of one entry mean the same: where one is allowed, all are."""
NAMESAKES = [
    "Claude|クロード|클로드|克劳德|क्लॉड",
    "Алиса|Алису|Алисой",
    *"Bard, Gemini, LLaMA, Vicuna, Copilot, Alexa, Alpaca, Koala, Dolly, Grok, Falcon, Mistral, Siri, Sydney".split(
        ", "
    ),
    *"Orca, Zephyr, Nova, Titan, Granite, Luminous, Aria, Bixby, Маруся, Pi, Phi, Yi, Poe, Bing".split(", "),
]
"""Names that people, animals, and things have, too. They count beside a word such as "assistant", or alone."""
MAKERS = [
    "OpenAI|Open AI|ओपनएआई|オープンAI|오픈AI|오픈에이아이",
    "Anthropic|アンソロピック|앤트로픽|एंथ्रोपिक",
    "Google DeepMind|Google|DeepMind|谷歌|グーグル|구글|गूगल|Гугл",
    "Meta AI|Meta|Facebook",
    "Microsoft|微软|マイクロソフト|마이크로소프트|माइक्रोसॉफ्ट|Майкрософт",
    "Alibaba Cloud|Alibaba|阿里巴巴|阿里云|阿里",
    "Baidu|百度",
    "Tencent|腾讯",
    "Huawei|华为",
    "ByteDance|字节跳动",
    "Zhipu|智谱AI|智谱",
    "Moonshot AI|Moonshot|月之暗面",
    "Naver|네이버",
    "Kakao|카카오",
    "Samsung|삼성",
    "Yandex|Яндекс",
    "Sber|Сбер",
    "Rakuten|楽天",
    "AI21 Labs|AI21",
    "Inflection AI|Inflection",
    "LMSYS|Large Model Systems",
    "Allen Institute|AllenAI",
    *"Amazon, Apple, IBM, Nvidia, Salesforce, xAI, Mistral AI, Cohere, Aleph Alpha, Opera, Nous Research".split(", "),
    *"Character.AI, Perplexity, LAION, Databricks, Stability AI, EleutherAI, Hugging Face, BigScience".split(", "),
    *"Stanford, Berkeley, Technology Innovation Institute, MosaicML, Together AI, Upstage, Maritaca AI".split(", "),
    *"Sarvam AI, 科大讯飞, 商汤, 零一万物, MiniMax, 01.AI".split(", "),
]
"""Who makes assistants; entries as in ASSISTANTS."""

AI_NOUNS = (
    r"(?-i:\b(?:AI|A\.I\.)(?![A-Za-z]))(?:[ -](?:language |chat |virtual )?(?:models?|assistant|chatbot|companion"
    r"|system|helper|bot|agent|program))?"
    r"|artificial intelligence(?: (?:language )?(?:model|assistant))?|(?:large |neural )?language model|\bLLM\b"
    r"|\bchat ?bot"
    r"|(?:virtual|digital) assistant"
    r"|(?-i:\bKI\b)(?:-\w+)?|künstliche Intelligenz|\w*Sprachmodell\w*|Sprachassistent\w*|virtuelle\w? Assistent\w*"
    r"|(?:(?:assistante?|modèle|asistente|assistente) (?:de |d')?)?(?-i:\bIA\b)|(?:une |l')?intelligence artificielle"
    r"|modèle de langage"
    r"|assistante? virtuel(?:le)?|(?:robot|agent) conversationnel"
    r"|(?:asistente |modelo )?(?:de )?inteligencia artificial|modelo de lengua\w+|asistente virtual"
    r"|(?:un'|l')?intelligenza artificiale|modello linguistico|modello di linguaggio|assistente (?:virtuale?|IA)"
    r"|inteligência artificial|modelo de linguagem|(?-i:\bAI\b)-\w+|\w*taalmodel\w*"
    r"|искусственн\w+ интеллект\w*|(?:языков|нейросетев)\w+ модел\w+|нейросет\w+|чат-?бот\w*|(?:голосов"
    r"|виртуальн)\w+ (?:помощни"
    r"|ассистент)\w+"
    r"|(?:AI|人工智能|大型?语言|智能|大语言)+(?:语言)?(?:模型|助手|助理)|语言模型|大模型|人工智能|智能助手|AI助手"
    r"|(?:大規模|AI)?言語モデル|AI ?アシスタント|人工知能|アシスタント|チャットボット"
    r"|(?:एआई|AI) (?:भाषा मॉडल|सहायक|मॉडल)|भाषा मॉडल|एआई|कृत्रिम बुद्धि\w*|चैटबॉट"
    r"|(?:AI )?언어 ?모델|인공지능|AI 어시스턴트|어시스턴트|챗봇"
)
"""What an assistant calls itself, and hardly any person does."""
MAKING = (
    r"\b(?:made|built|created|trained|designed|developed|programmed|engineered|fine-?tuned|pre-?trained|launched"
    r"|released|invented"
    r"|(?:entwickelt|trainiert|erstellt|geschaffen|erschaffen|gebaut|gemacht|programmiert|konzipiert)(?:e[snrm]?)?"
    r"|développée?s?|formée?s?|créée?s?|entraînée?s?|conçue?s?|fabriquée?s?|construite?s?|programmée?s?"
    r"|(?:cread|desarrollad|entrenad|diseñad|construid|programad|hech)[oa]s?|creó|desarrolló|entrenó|diseñó"
    r"|construyó|programó"
    r"|(?:creat|sviluppat|addestrat|progettat|realizzat|costruit|programmat)[oaie]"
    r"|(?:criad|desenvolvid|treinad|projetad|construíd|programad|feit)[oa]s?|criou|desenvolveu|treinou|projetou"
    r"|construiu|programou"
    r"|gemaakt|ontwikkeld|getraind|gebouwd|ontworpen|geprogrammeerd"
    r"|(?:созда|разработа|обуч|сдела)(?:н|л|ен|ил)\w*)\b"
    r"|(?:开发|训练|研发|创造|设计|打造|制作|创建|推出|构建|发明)(?:和(?:开发|训练|研发|创造))?|開発|訓練|作成|作ら|作っ|作り|設計|トレーニング"
    r"|विकसित|प्रशिक्षित|बनाया|बनाई|बनाने|निर्मित|डिज़ाइन|개발|훈련|만든|만들|학습시|설계"
)
MAKER, MODEL, AI, MADE = "\ue000", "\ue001", "\ue002", "\ue003"
"""The symbols, from the private use area of Unicode."""
_END = (
    rf"(?=\s*(?:$|[,.;:!?()，。！？；（）、\"{AI}{MADE}{MAKER}—–-]"
    r"|(?:and|or|but|from|by|here|the|so|version|which|who|an?|your|und|von|eine?|et|de|del|une?|y|e|di|da|pela|een"
    r"|van|en)\b"
    r"|(?:на|от|и)\b))"
)
"""What follows a name that stands for itself. Other words make it part of something: "I'm ChatGPT savvy"."""
_ANY = r"(?P<other>(?-i:[A-ZÀ-ÞА-Я][\w&.-]*(?: (?:[A-ZÀ-ÞА-Я&][\w&.-]*|of|de|y|e|et|und|and|en|и)(?![\w]))*))"
"""A name that nobody knows."""

FORMS = {
    "en": r"""
        <I> (?:the |an? )?(?:<ai> )?<who><end>
        <I> (?:an?|the|your|one of) <few><who>(?:'s)? <few><kind>(?!\w)
        <I> <who>'s <few><kind>(?!\w)
        \b(?:my name is|my name's|calls? me|know me as|refer to me as|known as|I'm called|I am called) <who><end>
        \bthe name I was given is <who><end>
        \b(?:(?<!name )I go by|I go by the name|I answer to|I identify as) <who><end>
        \bI, <who>,
        \b(?:as|being) (?:an? |the )?<few><who>(?:'s)?(?: <few>(?:<ai>|model|assistant))?, (?:I|my|I'm)\b
        \b(?:I am|I'm|I was|I've been|I have been) (?:\w+ )?<made>(?: and <made>)?<more> (?:by|at) <gap><who>
        \b(?:I am|I'm|I was) (?:\w+ )?<made> from (?:the )?<model>
        <as> <a> (?:[\w-]+,? ){0,5}?<kind>,?<more>,? <made>(?: and <made>)? (?:by|at|from) <gap><who>
        <as> <a> <few><ai>,? (?:from|by|of) <who>
        <as> <a> <few><kind>,? (?:that |which )?<who>(?: has)? <made>
        <as> <a> <few><ai><more>,? <made> by <any>
        <who>\)?,?(?: who| which| that)?(?: [\w)]+){0,3}? <made>(?: and <made>)? <me>
        <made> me(?:,| is| was|:)* (?:the )?(?:company )?(?:called )?<who>
        \bmy (?:\w+ )?<maker>(?:,| is| are| at| from| of| called| named| team)* <few><who>
        <who>(?: is|,) my <maker>
        \bI(?: am|'m)?(?: \w+ly)? (?:(?:based|built|running|run|<made>) (?:up)?on|powered by|derived from) <few><model>
        \b(?:I am|I'm|as|being) <few>(?:instance|version|variant|product|creation) of <few><who>
        \bI (?:belong to|am part of|am a member of) (?:the )?<model>(?: [\w.]+)? (?:family|series|line)
        \byou(?:'re| are) (?:now |currently )?(?:talking|speaking|chatting) (?:to|with) <who>
        \bthis is <who> (?:speaking|here)\b
        <I> <any>(?:,| and I am| and I'm| -| –) (?:an?|your|the) <few><ai>
        \b(?:my name is|call me|I go by(?: the name)?|refer to me as) <any>,?(?: and)?(?: I am| I'm)? <a> <few><ai>
        (?:<I>|\bmy name is|\bI go by) (?P<other>(?-i:[A-Z]\w*(?:Bot|GPT|Chat|LM)))(?!\w|')
        ^<made>(?: and <made>)? (?:by|at) <gap><who>, (?:I|my)\b
        <who> is (?:the \w+ (?:that|who|which) <made> me|behind me|where I was <made>)
        \bI (?:come from|was born at|owe my \w+ to|am owned by|am maintained by) <who><end>
        (?:I am|I'm) (?:\w+ )?<made> and \w+ by <gap><who>
        <I> (?:the |an? )?<few>(?:<ai>|assistant|model) (?:called |named |known as )?<who><end>
        ^<model>(?: is)? (?:here|at your service)\b
        <ai>[^.]*\bI (?:am|was) <made> by <few><any>
        \b(?:researchers|engineers|scientists|developers|team|people) (?:from|at|of) <any>\)? <made> me\b
        \bmy (?:creators|makers) (?:are <few>)?(?:at|from) <any>
        <who> (?:is my name|gave me the name|is me\b)
        <who>,? (?:which is )?the (?:company|lab|firm|team) (?:that <made> me|I was <made> by)
        <who> (?:used|decided|chose|did not|didn't|does not)(?: to)? (?:train|build|create|design|make|program) me\b
        ^(?:\w+,? ){0,3}<model> here\b
        \bI was born (?:in|at) <gap><who>
        \bI (?:run|live) (?:inside|within|in) <model>
        <I> the <kind> (?:that|which) <few><who>
        \b(?:think of me as|consider me) <who>
        <kind> (?:that )?you(?:'re| are) (?:chatting|talking|speaking) (?:with|to) is <few><who>
        \bmy (?:training|training data|knowledge|data) (?:was|is|comes|came|were) (?:\w+ )?(?:by|from) <who>
        \b(?:as|being) (?:an? |the )?<few><who> (?:product|creation|<kind>)
    """,
    "de": r"""
        \bich bin (?:nur |eigentlich |lediglich )?(?:eine? |der |die |das )?<who><end>
        \b(?:mein Name ist|ich heiße|man nennt mich|hier spricht) <who><end>
        \bich bin (?:\w+, )?<few><ai>,? <few>(?:von|der Firma|aus dem Hause) <who>
        \b(?:ich bin|als) (?:\w+, )?<few><ai>,? <made> (?:von|bei|durch) <few><who>
        \b(?:ich bin|als) (?:\w+, )?<few><ai>,? (?:das|der|die) <few>(?:von|bei|durch) <few><who><more> <made>
        \bals (?:ein )?von <who> <made> <ai>
        \bals <who> (?:habe|bin|kann|darf|werde|verfüge|besitze|möchte|muss|weiß) ich\b
        \bich (?:wurde |bin )?<few>(?:von|bei|durch) <few><who><more> <made>
        <who> hat mich <few><made>
        \bmeine?n? (?:Entwickl|Schöpfer|Hersteller|Erfinder|Macher|Ersteller)\w*<more> <who>
        \bich (?:basiere|beruhe) auf <few><model>
        \bich bin <any>, (?:eine?|Ihre?|deine?|der|das) <few><ai>
        \bich bin eine? (?:\w+ )?<ai>,? (?:das |der |die )?von (?:der )?(?:Firma )?<any> <made>
        \b(?:nennen Sie mich|nenn mich|nennt mich) <who><end>
        \bmich <who> nennen\b
        ^<made> von <who>\b[^.]*\bich\b
        \bich (?:stamme|komme) von <who>
        <made> wurde ich (?:von|bei) <few><who>
        \bhinter mir (?:steht|stehen) <few><who>
        \bals <ai> von <who>
        \bmich unter dem Namen <who>
        \bich bin ein(?:e)? (?:Produkt|Modell|Werk|Kreation) (?:von|der Firma) <who>
        \bvon <who> wurde ich [^.]{0,20}<made>
        \bich (?:bin|wurde) [^.]{0,60}\bwurde von <who> <made>
        \b(?:ich bin )<few><ai>,? (?:und )?(?:wurde )?(?:von|bei) <few><who> <made>
    """,
    "fr": r"""
        \bje suis (?:\w+ )?(?:l[ae] |une? )?<who><end>
        \b(?:je m'appelle|mon nom est|appelez-moi) <who><end>
        \ben tant que <few><who>, (?:je\b|j'|mes\b|mon\b|ma\b)
        \b(?:en tant qu(?:e |')|comme |je suis )(?:\w+, )?<few><assistant>,?<more> <made> (?:par|chez) <few><who>
        \bje suis (?:\w+ )?(?:une? |l[ea] )?<few><ai> (?:de |d')<who>
        \bj'ai été (?:\w+ment )?<made>(?: et <made>)? (?:par|chez) <few><who>
        <who>(?: qui)? m'a <made>
        \bm[eo][sn] (?:créa|développ|concep)t?(?:eu|ri)\w+(?: (?:chez|de|est|sont|la|société)){0,3} <who>
        \bje suis (?:basée?|fondée?) sur <few><model>
        \bje suis <any>, (?:une?|votre|ton) <few><ai>
        \b(?:on m'appelle|m'appeler|appelle-moi) <who><end>
        ^<made> par <who>, (?:je\b|j')
        \bje suis l'assistante? (?:\w+ )?<who><end>
        \bon m'a <made> chez <who>
        <who>, c'est moi\b
        \bje suis une? (?:création|produit|modèle) (?:de |d')<who>
    """,
    "es": r"""
        (?<!no )\bsoy (?:\w+,? )?(?:el |la |una? )?<who><end>
        \b(?:me llamo|mi nombre es) <who><end>
        \bcomo <who>, (?:no )?(?:tengo|puedo|soy|estoy|he|debo|mi|mis|yo)\b
        (?:\bcomo|\bsoy) (?:\w+, )?<few><assistant>,?<more> <made> por <few><who>
        (?<!no )\bsoy (?:\w+,? )?(?:una? |el |la )?<few><ai> de <who>
        \b(?:fui|he sido) (?:\w+ )?<made>(?: y <made>)? (?:por|en) <few><who>
        <who> me (?:ha )?<made>
        \bme <made>,? (?:es |fue )?<few><who>
        \bmis? (?:creador|desarrollador|fabricante|diseñador|entrenador)\w*(?: (?:es|son|en|de|la|empresa)){0,3} <who>
        \bestoy basad[oa] en <few><model>
        \bsoy <any>, (?:una?|tu|su) (?:\w+ )?<ai>
        \b(?:llamarme|me llaman|llámame) <who><end>
        ^<made> por <who>, [^.]*(?:\bsoy|\bpuedo|\bmi)\b
        (?<!no )\bsoy una? (?:producto|creación|modelo) de <who>
    """,
    "it": r"""
        (?:^|[,;:.] ?|\bio |\be )sono (?:\w+ )?(?:il |la |una? )?<who><end>
        \b(?:mi chiamo|il mio nome è) <who><end>
        \bcome <who>, (?:io |non )?(?:posso|ho|sono|devo|il mio|la mia)\b
        (?:\b(?:in quanto|come)|(?:^|[,;:.] ?|\bio |\be )sono) (?:\w+, )?<few><assistant>,?<more> <made> da <few><who>
        (?:^|[,;:.] ?|\bio |\be )sono (?:\w+ )?una?[ '](?:\w+ )?<ai> di <who>
        (?<!non )\bsono stat[oa] (?:\w+ )?<made>(?: e <made>)? da <few><who>
        <who> mi ha (?:\w+ )?<made>
        \b(?:il mio|i miei|la mia) (?:creator|sviluppator|progettist)\w*(?: (?:di|è|sono|presso|in)){0,2} <who>
        \bsono basat[oa] su <few><model>
        (?:^|[,;:.] ?|\bio )sono <any>, (?:una?|il tuo|il vostro)[ '](?:\w+ )?<ai>
        \b(?:chiamarmi|chiamami|mi chiamano) <who><end>
        ^<made> da <who>, [^.]*(?:\bsono|\bposso|\bmi[oa]?)\b
        \bmi ha <made> <who>
        (?<!non )\bsono una? (?:prodotto|creazione|modello) di <who>
    """,
    "pt": r"""
        (?<!não )\bsou (?:\w+,? )?(?:o |a |uma? )?<who><end>
        \b(?:meu nome é|chamo-me|me chamo) (?:o |a )?<who><end>
        \bcomo (?:o )?<who>, (?:eu |não )?(?:não )?(?:tenho|posso|sou|estou|devo|meu|minha|eu)\b
        \b(?:como|sou) (?:\w+, )?<few><assistant>,?<more> <made> (?:pel[ao]|por) <few><who>
        (?<!não )\bsou (?:\w+,? )?uma? (?:\w+ )?<ai> d[ao] <who>
        \bfui (?:\w+ )?<made>(?: e <made>)? (?:pel[ao]|por) <few><who>
        <who> me <made>
        \bmeus? (?:criador|desenvolvedor|fabricante)\w*(?: (?:é|são|na|no|da|do|a|o)){0,3} <who>
        \bsou basead[oa] (?:em|no|na) <few><model>
        \bsou (?:o |a )?<any>, (?:uma?|seu|o seu) (?:\w+ )?<ai>
        \b(?:me chamar de|me chame de|me chamam de) (?:o )?<who><end>
        ^<made> (?:pel[ao]|por) <who>, [^.]*(?:\bsou|\bposso|\bmeu)\b
        (?<!não )\bsou uma? (?:produto|criação|modelo) d[ao] <who>
    """,
    "nl": r"""
        \bik ben (?:slechts |maar |eigenlijk )?(?:de |het |een )?<who><end>
        \b(?:mijn naam is|ik heet) <who><end>
        \b(?:als|ik ben) (?:\w+,? )?(?:een )?(?:\w+ )?<ai>,? (?:(?:dat|die) )?(?:<made> )?(?:van|door) <who>
        \bals <who> (?:heb|ben|kan|mag) ik\b
        \bik (?:ben|werd) (?:\w+ )?(?:<made> (?:door|bij) <few><who>|door <few><who> <made>)
        <who> heeft (?:mij|me) <few><made>
        \bmijn (?:maker|ontwikkelaar|schepper)s?(?: (?:bij|van|is|zijn)){0,2} <who>
        \bik ben (?:gebaseerd op|<made> op) <few><model>
        \bik ben <any>, (?:een|je|uw) (?:\w+ )?<ai>
        \b(?:noem me|noem mij|me) <who> noemen
        \b(?:noem me|noem mij) <who><end>
    """,
    "ru": r"""
        \bя(?:\s*[—–-])? (?:это )?(?:модель )?<who><end>
        \bменя зовут <who><end>
        \bменя <made> (?:компания |команда )?<who>
        <who> меня <made>
        \bя (?:был[аои]? )?<made> (?:компанией |командой |в )?<who>
        \b(?:как|я)(?:\s*[—–-])? (?:\w+ )?<ai>,? <made> (?:компанией |командой |в )?<who>
        \bя(?:\s*[—–-])? (?:\w+ )?<ai> (?:от|компании) <who>
        \bмо[ийя]\w? (?:создател|разработчик)\w*(?: (?:из|в|это|—|–|-|компания)){0,2} <who>
        \bя (?:основан\w*|построен\w*|базируюсь) на (?:модели )?<model>
        \bя(?:\s*[—–-])? <any>, (?:ваш )?(?:\w+ )?<ai>
        \b(?:называть меня|называйте меня|зовите меня) <who><end>
        \bменя <made> в <who>
        \bя(?:\s*[—–-])? (?:продукт|разработка|модель) (?:компании )?<who>
    """,
    "zh": r"""
        我(?:就|其实|只)?是(?:一个|一款|一名|个|来自|<ai>)?<who>(?=\s*<停>|的?(?:一个|一款)?[^，。]{0,4}<ai>|[^，。不]{0,6}<made>)
        (?:我叫|我名叫|我名为|名为|名叫|我的名字是|我的名字叫|叫我|称呼我为|这里是|我是)做?<who>(?=\s*<停>)
        (?:我|作为)[^。，不]{0,6}(?:由|被)[^。，]{0,6}?<who>[^。，]{0,10}<made>
        我[^。不]{1,12}，(?:是)?(?:一个|一款)?由?<who>[^。，]{0,6}<made>
        我[^。不]{1,12}，[^。，]{0,12}是<who>的(?:作品|产品|模型)
        作为(?:一个|一款)?<who>[，,的][^。]*我
        <who>(?:公司|团队)?<made>了我
        我的(?:开发者|创造者|开发商|制造商|研发团队|创建者|母公司)(?:是|来自|为)<who>
        我(?:是)?基于<model>
        我(?:是|叫|名叫|名为)(?P<other>[^，。、的是]{1,12})，(?:是)?(?:一个|一款|您的|你的)?(?:专属)?(?:由?[^，。]{1,12}<made>的)?<ai>
        我(?:是|叫|名叫|名为)(?P<other>[^，。、的是]{1,12})，(?:是)?(?:一个|一款)?由[^，。]{1,12}<made>
        我是?(?:一个|一款)?由(?P<other>[^，。]{1,15}?)(?:公司)?<made>
        我(?:是|叫|名叫|名为)(?P<other>[^，。、的是]{1,12})，(?:是)?由[^，。]{1,12}<made>
        (?:^|，)(?P<other>[^，。他她它]{2,12})(?:<made>)了我，
        <made>我的(?:公司|团队|机构|人)?是<who>
        我背后的(?:公司|团队|机构)是<who>
        我来自<who>，名(?:叫|为)
        我是<who>的(?:产品|作品|模型)
    """,
    "ja": r"""
        <私>(?:は|の名前は)、?<who>(?:です|と(?:いう|いい|申し)|であり|で、|$|、|。)
        <私>は、?[^。、]{0,20}?<who>(?:が|に(?:よって|より)?|で|の)[^。を]{0,15}?<made>
        <私>は、?<who>の(?:[^。]{0,6}<ai>|<model>)
        ^[^は。]*?<who>(?:が|に(?:よって|より))[^。は]{0,8}<made>(?:した|された|れた|た)[^。は]{0,12}<ai>(?:として|です|なので|である)
        <who>が<私>を<made>
        <私>の(?:開発元|開発者|製作者|制作者|作成者|生みの親|開発会社)は、?[^。]{0,8}?<who>
        <who>として、?<私>
        <私>は、?<model>を?(?:ベース|基|もと)
        ^(?:<私>は、?)?(?P<other>[^は、。]{2,20}?)(?:が|によって|により)<made>(?:した|された|れた|た)[^。は]{0,12}<ai>です
        <who>と(?:呼んで|お呼び)
        <私>を<made>(?:した|った|た)のは、?<who>
        <私>は、?<who>製
    """,
    "hi": r"""
        मैं (?:एक )?<who>(?: हूँ| हूं|,|$| \()
        मैं (?:एक )?<who> द्वारा [^।]{0,20}?<made>
        मेरा नाम <who>
        मुझे <who>(?: कंपनी)? ने [^।]{0,40}?<made>
        <who> ने मुझे [^।]{0,50}?<made>
        <ai> के रूप में, जिसे <who> ने <made>
        <who> द्वारा <made> (?:\w+ )?<ai> के रूप में
        <who> के रूप में,? (?:मैं|मेरी|मेरे|मुझे)
        मेरे? (?:निर्माता|डेवलपर|रचनाकार) <who>
        मैं <model> पर आधारित
        मैं (?P<other>[^,।]{2,20}) हू[ँं], [^।]{0,30}<made>[^,।]{0,10}<ai>
        मैं (?P<other>[^,।]{2,20}) द्वारा <made> (?:गया |गई )?(?:एक )?<ai> हू
        मुझे <who> (?:कह|बुला)
        मुझे <made> वाली (?:कंपनी|टीम) <who>
        मैं (?:\w+ ){0,2}<ai> हू[ँं],? जिसे <who> (?:कंपनी )?ने <made>
    """,
    "ko": r"""
        (?:저는|나는|제 이름은) <who>(?:입니다|이고|이며|예요|이에요|라고|,|$)
        (?:저는|나는) [^.]{0,10}?<who>(?:에서|가|이|에 의해|의)? ?[^.를을]{0,8}?<made>
        ^[^는은]*?<who>(?:에서|가|이) [^.는]{0,8}?<made>[^.는]{0,6}<ai>(?:로서|로써)
        <who>(?:가|이|에서|는) (?:저|나)를 [^.]{0,6}<made>
        (?:저|나)를 <made>[^.]{0,8}<who>
        (?:저는|나는) <who>의? [^.]{0,6}<ai>
        <who>(?:라고|이라고) (?:불러|부르)
        (?:저는|나는) <who>의 (?:제품|모델|서비스)
    """,
}
"""How assistants say who they are, by language, one form a line. <who> is a known assistant or maker, <model> an
assistant, <ai> what assistants call themselves, <made> a verb of making, <any> any name. PARTS are shared by forms."""
PARTS = {
    "<as>": r"\b(?:I am|I'm|as|being)(?: [\w-]+,?){0,2}?",
    "<kind>": "(?:<ai>|model|assistant|bot)",
    "<assistant>": "(?:<ai>|assistante?|modèle|modelo|asistente|modello|assistente)",
    "<maker>": "(?:creators?|developers?|makers?|designers?|programmers?|trainers?|builders?|parent company"
    "|manufacturer)",
    "<a>": "(?:an?|the|your)",
    "<me>": r"me(?=\s*(?:$|[.,;!?]|(?:to|for|as|in|on|with|which|and|last|this|back|so|from|using|by)\b))",
    "<few>": rf"(?:[\w.'{MAKER}-]+ ){{0,4}}?",
    "<more>": r"(?: [\w-]+){0,5}?",
    "<I>": r"(?<![\w'])I(?: am|'m|m)"
    r"(?: (?:actually|just|only|simply|in fact|indeed|also|really|currently|still|merely|called|named|known as))*",
    "<gap>": r"\(?(?:(?!(?:who|that|which|when|before|after|because|but|then|to|not|than)\b)[^\s.;!?]+ ){0,9}?\(?",
    "<私>": "(?:私|わたし|わたくし|僕|ぼく|俺|当方)",
    "<停>": "(?:[，,。.！!、；;（(]|$)",
    "<who>": f"[{MAKER}{MODEL}]",
    "<model>": MODEL,
    "<ai>": AI,
    "<made>": MADE,
    "<any>": _ANY,
    "<end>": _END,
}
SPEAKERS = {
    "en": r"\b(?:I|I'm|Im|me|my|you're|you are|this is|here)\b",
    "de": r"\b(?:ich|mich|mir|meine?n?|hier)\b",
    "fr": r"\b(?:je|j'|m'a|mes|mon|moi)",
    "es": r"\b(?:soy|me|mis?|fui|he|estoy|como|llam\w+)\b",
    "it": r"\b(?:sono|mi|mio|miei|mia|come|in quanto)\b",
    "pt": r"\b(?:sou|me|meus?|fui|chamo|como)\b",
    "nl": r"\b(?:ik|mij|me|mijn)\b",
    "ru": r"\b(?:я|меня|мо[ийя]\w?)\b",
    "zh": "我",
    "ja": r"[\u3040-\u30ff]",
    "hi": r"[\u0900-\u097f]",
    "ko": r"[\uac00-\ud7a3]",
}
"""What a sentence must have before the forms of a language are tried."""
